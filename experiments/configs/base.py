"""Every setting with its default. A configuration takes this one and changes what differs."""

from ml_collections import ConfigDict


def options(**entries):
    """A ConfigDict of options, to be replaced as a whole; the command line can only change its entries."""
    return ConfigDict(entries)


def kernel(
    bilateral_weight, bilateral_position_width, bilateral_colour_width, gaussian_weight, gaussian_position_width
):
    """The fields of `lcrf_jax.KernelParams`."""
    return ConfigDict(
        {
            "bilateral_weight": bilateral_weight,
            "bilateral_position_width": bilateral_position_width,
            "bilateral_colour_width": bilateral_colour_width,
            "gaussian_weight": gaussian_weight,
            "gaussian_position_width": gaussian_position_width,
        }
    )


def at_input_size(config, before):
    """What is in pixels or cells of the network's input, for the input size of a configuration in the place of another one.

    A configuration of your own may set them all: ``config.update_from_flattened_dict(base.at_input_size(config, 320))``.

    Args:
      config: with the new input_size.
      before: the input size that its other settings are for.

    Returns:
      dict from the dotted names of the settings to their new values.
    """
    share = config.input_size / before

    def size_of(size):
        return config.input_size if size == before else max(round(size * share / 32), 1) * 32  # a multiple that every backbone takes

    values = {
        "inference.input_sizes": tuple(map(size_of, config.inference.input_sizes)),
        "class_maps.extra_sizes": tuple(map(size_of, config.class_maps.extra_sizes)),
        "class_maps.grid": max(round(config.class_maps.grid * share), 1),
    }
    kernels = {"objective": config.objective.kernel, "posterior": config.posterior.kernel, "baselines.sec": config.baselines.sec.kernel}
    for name, widths in kernels.items():
        for width in ("bilateral_position_width", "gaussian_position_width"):
            values[f"{name}.kernel.{width}"] = round(widths[width] * share, 3)
    return values


def get_config():
    """The defaults."""
    config = ConfigDict()
    config.seed = 0
    config.method = "latent_crf"  # a key of lcrf_jax.train.methods.METHODS; full_supervision needs masks of the training split

    config.data = ConfigDict()
    config.data.kind = "folder"  # a key of lcrf_jax.data.opening.SOURCES
    config.data.root = ""
    config.data.train_split = "train"
    config.data.val_split = "val"  # its masks are for the score and for choosing best/; a part is "val[0::2]"; "" for none
    config.data.options = ConfigDict()  # of the kind
    config.data.on_bad_image = "error"  # or "skip": photographs that cannot be read are named and left out

    config.network = ConfigDict()
    config.network.backbone = "efficientnet_lite0"  # or another of docs/backbones.md, or small
    config.network.last_stride = 16
    config.network.taps = ("head", "s16", "s8")
    config.network.widths = (192, 128, 96)
    config.network.dropout = 0.2
    config.network.decoder = "skip"  # or original, large_field; see lcrf_jax.nets.original
    # Of the products in convolutions; bfloat16 halves their memory and is faster on accelerators. Parameters, features,
    # logits, the bound and all of the CRF stay float32.
    config.network.compute_dtype = "float32"
    # The backbone is trained from this stage or block on, such as stage5, conv5 or block10, with optimizer.backbone_share; "":
    # it is frozen. It needs cache.features=False. Batch norm stays folded into the convolutions.
    config.network.trainable_from = ""
    # Of the backbone: "" for those that are installed, a file .safetensors or .pth, hf:REPOSITORY@REVISION, or random.
    config.weights = ""
    config.input_size = 320

    config.views = ConfigDict()  # of each training image: 0 whole, 1 mirrored, 2 and up random crops
    config.views.num_views = 2
    config.views.seed = 0
    config.views.scale_range = (0.4, 1.0)
    config.views.ratio_range = (0.75, 1.3333)

    config.cache = ConfigDict()
    config.cache.features = True  # keep frozen features on disk; False runs the backbone in every step
    config.cache.features_gb = 20.0  # features that would take more gigabytes are not kept, and the run says so
    config.cache.directory = ""  # "" is $LCRF_JAX_CACHE or the user's cache folder

    config.classifier = ConfigDict()
    config.classifier.l2 = 0.01
    # Of clip_vitb16: a .npz of class name -> vector of its text; the classifier is then not fitted. docs/backbones.md says how.
    config.classifier.text_embeddings = ""
    config.class_maps = ConfigDict()
    config.class_maps.extra_sizes = ()  # further input sizes that the maps are averaged over
    config.class_maps.grid = 40

    config.objective = ConfigDict()
    config.objective.likelihood = "evidence"  # a name of lcrf_jax.bound.likelihoods; those below are its options
    config.objective.likelihood_options = options(
        # Of class_evidence; saliency_weight above 0 needs the classifier's gradient for every training image.
        # objectness_weight is at most 1 as a rule; objectness is made with the class maps and costs nothing.
        evidence=options(background_level=0.2, sharpness=2.0, floor=0.01, saliency_weight=0.0, objectness_weight=0.0),
        frozen_classifier=options(scale=1.0),
        gwrp=options(foreground_decay=0.996, background_decay=0.999),
        area=options(beta=20.0, foreground_share=0.1, background_share=0.3),
        noisy_or=options(rho=0.1),
        max_pool=options(),
        log_mean_exp=options(sharpness=5.0),
    )
    # Multiplied to the likelihood in these powers; 0: not at all. Beside `evidence`, of the order of the number of cells.
    config.objective.further_likelihoods = options(area=0.0, gwrp=0.0, log_mean_exp=0.0, max_pool=0.0, noisy_or=0.0)
    # Of `evidence`: how far the cues of config.baselines.cues, multiplied to the class maps, are trusted; 0: no cues.
    config.objective.cue_confidence = 0.0
    # Of E_q log p(y|z,x): gumbel_softmax, straight_through, reinforce (num_samples of 2 or more), mean (q itself in
    # the place of samples), exact (evidence and max_pool have a closed form); or mcmc, which fits q to samples of
    # p(z|x,y) by maximum likelihood.
    config.objective.estimator = "gumbel_softmax"
    config.objective.temperature = 1.0
    # Reached at the end of anneal_epochs of each round; 0: no schedule. On photographs .2 helped at 20x20 logits and hurt
    # at 40x40, see docs/estimators.md.
    config.objective.final_temperature = 0.0
    config.objective.anneal_epochs = 4.0
    config.objective.num_samples = 1
    config.objective.noise_block = 1  # cells along a side of the blocks that share their noise
    config.objective.num_sweeps = 5  # of mcmc, in each step
    # All three weights 1: the bound. `evidence` is a sum over cells like the KL; the other likelihoods are sums over
    # classes, and need a weight of the order of the number of cells to be heard beside it.
    config.objective.likelihood_weight = 1.0
    config.objective.entropy_weight = 1.0
    config.objective.pairwise_weight = 1.0
    config.objective.pairwise_warmup_epochs = 1.0
    config.objective.pairwise_stride = 0  # pixels of the input per cell of the pairwise term; 0: as the logits; 1: all
    config.objective.pairwise_form = ""  # exact, anchors or lattice; "" chooses by the number of cells
    config.objective.kernel = kernel(0.3, 80.0, 13.0, 0.1, 24.0)  # in pixels of the network's input

    # Of the compared methods: the numbers of their papers unless a configuration says otherwise. Keyword arguments of the
    # functions in lcrf_jax.baselines, but for those of stc, which has none, and sec.
    config.baselines = ConfigDict()
    config.baselines.mil_ilp = options(sharpness=5.0)
    config.baselines.em_adapt = options(foreground_share=0.2, background_share=0.4)
    config.baselines.ccnn = options(
        foreground_share=0.05, background_least=0.3, background_most=0.7, slack=2.0, num_iterations=30
    )
    config.baselines.cam = options(background_level=0.2, sharpness=2.0, floor=0.01)
    config.baselines.sec = ConfigDict()
    config.baselines.sec.min_prob = 1e-4
    config.baselines.sec.foreground_decay = 0.996
    config.baselines.sec.background_decay = 0.999
    config.baselines.sec.num_iterations = 10
    # In pixels of the network's input: 80 / 12 and 3 / 12 cells at stride 8.
    config.baselines.sec.kernel = kernel(10.0, 53.3, 13.0, 3.0, 2.0)
    config.baselines.stc = ConfigDict()
    config.baselines.cues = ConfigDict()  # seeds of sec; of latent_crf with objective.cue_confidence
    config.baselines.cues.file = ""  # .npz with "ids" and "cues"; "" makes them of the tag classifier
    config.baselines.cues.foreground_level = 0.2
    config.baselines.cues.background_share = 0.1
    config.baselines.cues.background_by = "gradient"  # of the tag classifier where it is least; or "objectness"
    config.baselines.saliency = ConfigDict()  # of stc
    config.baselines.saliency.image_size = 96
    config.baselines.saliency.contrast = 10.0
    config.baselines.saliency.level = 1.5
    config.baselines.superpixels = options(scale=100.0, sigma=0.8, min_size=50)  # in pixels of the photograph

    # The first round is trained on the class maps of the tag classifier, each further one goes on from there on the
    # mean-field posteriors of the training images under the round before, given their tags.
    config.evidence_posterior = False  # the first round, too, learns from posteriors: of the CRF on the class maps' evidence
    # With it: a linear network that has learnt from these makes those that the first round learns from.
    config.linear = ConfigDict()
    config.linear.num_steps = 0  # of 1,024 cells of training images; 0: no such network
    config.linear.learning_rate = 1e-3
    config.linear.weight_decay = 1e-2
    config.linear.unary_weight = 1.0  # of its log-probabilities beside the CRF, the mean over class_maps.extra_sizes and the main one
    config.linear.evidence_weight = 0.0  # of the class maps' log-evidence beside the linear network's log-probabilities
    config.epochs = (4, 4)
    config.rounds = 2  # of latent_crf: epochs has a number for each. Of other methods the sum of the epochs counts
    config.least_steps = 0  # of each round: with few images an epoch is several passes over them
    config.posterior = ConfigDict()
    config.posterior.unary_weight = 1.0  # of the network's log-probabilities
    config.posterior.linear_weight = 0.0  # of the linear network's beside them, where there is one
    config.posterior.evidence_weight = 0.0  # of the class maps' log-evidence beside the network's log-probabilities
    config.posterior.maps_weight = 1.0  # of the class maps' log-evidence alone, before there is a network
    config.posterior.tempering = 1.0  # the log-posterior is multiplied by it
    config.posterior.num_iterations = 10
    config.posterior.kernel = kernel(8.0, 80.0, 13.0, 2.0, 8.0)  # in pixels of the network's input

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_share = 0.05
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.optimizer.backbone_share = 0.1  # rate of a backbone that is trained, as a share of learning_rate
    config.batch_size = 16  # of all devices together, and a multiple of their number
    config.accumulation_steps = 1  # parts of a batch, one after the other, where memory is short; the result is the same
    # With network.trainable_from: what lies within a block is computed again for gradients, and not kept, where memory is short.
    config.recompute_backbone = False
    config.max_skipped_in_a_row = 10  # steps without a finite loss change nothing; after so many the run ends
    config.num_threads = 2
    config.log_every_steps = 20
    config.eval_every_epochs = 3
    config.save_every_steps = 100  # and whenever the parameters are scored

    # v: v log(max n / n_k) is added to the network's log-probabilities of class k, at test time and in the posteriors of rounds,
    # n_k the number of training images with its tag; no class counts as less than a tenth of the most frequent one.
    config.balance_weight = 0.0
    config.inference = ConfigDict()
    config.inference.input_sizes = (320,)
    config.inference.mirror = True
    config.inference.max_side = 640  # photographs with a longer side are worked on at this one
    # w: w (log p_k - max log p) is added to the log-probabilities of the foreground classes, p of the tag classifier.
    config.inference.prior_weight = 0.0
    config.inference.unary_weight = 1.0
    config.inference.num_iterations = 10
    config.inference.kernel = kernel(8.0, 80.0, 13.0, 2.0, 3.0)  # in pixels of the photograph as it is worked on
    return config
