"""The inference network: a frozen backbone and a trainable decoder, and the tag classifier on the same features.

Read `network` first: which backbones and decoders there are, and the functions that training calls. `inputs` is what an
image becomes before the first layer. `efficientnet_lite`, `vgg`, `resnet` and `vision_transformer` are the
backbones, `decoder` and `original` the decoders. `weights` finds published weights, `pretrained` reads their files, `naming` brings their arrays into our layouts,
and `tables` has the published names of each network. `trained` says which layers of a backbone are trained, where they are not all frozen.
`tag_classifier` is a linear classifier of image tags, `text_classifier` makes one of the texts of class names, `linear`
labels each cell by a softmax on the features there, and `objectness` says where an object is, of whatever class.

The room imports Flax, and of the house the rooms of pure functions and `machine` alone.
"""
