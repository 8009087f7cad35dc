"""The inference network: a frozen backbone and a trainable decoder, and the tag classifier on the same features.

Read `network` first: which backbones and decoders there are, and the functions that training calls. `inputs` is what an
image becomes before the first layer. `efficientnet_lite` and `vgg` are the backbones, `decoder` and `original` the
decoders. `weights` brings published weights into our names, `pretrained` reads their files. `tag_classifier` is a linear
classifier of image tags, `objectness` says where an object is, of whatever class.

The room imports Flax, and of the house the rooms of pure functions and `machine` alone.
"""
