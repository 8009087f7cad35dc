"""Vision transformers and ResNet-50 in float64 NumPy, from arrays in published names, and random arrays for them."""

import math

import numpy as np


def random_state(parts, shapes, seed=0):
    """Random arrays for a table of names: as large as keeps the network's values moderate."""
    rng, state = np.random.default_rng(seed), {}
    for part in parts:
        for name, shape in part.published_shapes(shapes).items():
            noise = rng.normal(size=shape)
            if name.endswith("running_var"):
                noise = 0.5 + np.abs(noise)
            elif len(shape) > 1 and "token" not in name and "pos" not in name:
                noise *= np.sqrt(1.5 / math.prod(shape[1:]))
            elif name.endswith(".weight") and "pos" not in name:
                noise = 1 + 0.2 * noise
            state[name] = np.float32(noise)
    return state


def layer_norm(x, state, prefix, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normal * state[f"{prefix}.weight"] + state[f"{prefix}.bias"]


def dense(x, state, prefix):
    return x @ state[f"{prefix}.weight"].T + state[f"{prefix}.bias"]


def activation(x, quick):
    if quick:
        return x / (1 + np.exp(-1.702 * x))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def attention(x, state, prefix, heads):
    """One head after the other, one token after the other."""
    result = np.zeros_like(x)
    queries, keys, values = np.split(dense(x, state, f"{prefix}.qkv"), 3, axis=-1)
    size = x.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for token in range(len(x)):
            scores = keys[:, part] @ queries[token, part] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            result[token, part] = weights / weights.sum() @ values[:, part]
    return dense(result, state, f"{prefix}.proj")


def interpolated(grid, shape):
    """Bicubic with a = -0.75 on [g, g, C], its edge repeated, one cell after the other."""

    def weight(x, a=-0.75):
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0

    side, result = len(grid), np.zeros((*shape, grid.shape[-1]))
    for i, j in np.ndindex(*shape):
        y, x = ((at + 0.5) * side / wanted - 0.5 for at, wanted in zip((i, j), shape))
        for row in range(math.floor(y) - 1, math.floor(y) + 3):
            for column in range(math.floor(x) - 1, math.floor(x) + 3):
                value = grid[min(max(row, 0), side - 1), min(max(column, 0), side - 1)]
                result[i, j] += weight(y - row) * weight(x - column) * value
    return result


def vision_transformer(state, x, variant):
    """Taps of one image [H, W, 3], from arrays in the names of DINOv2's hub; bicubic positions without antialiasing."""
    state = {name: np.float64(array) for name, array in state.items()}
    patch, (height, width) = variant.patch, (side // variant.patch for side in x.shape[:2])
    kernel, tokens = state["patch_embed.proj.weight"], []
    for i, j in np.ndindex(height, width):
        window = x[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        tokens.append(np.einsum("oiyx,yxi->o", kernel, window) + state.get("patch_embed.proj.bias", 0))
    positions = state["pos_embed"][0]
    grid = positions[1:].reshape(variant.grid, variant.grid, -1)
    tokens = np.array(tokens) + interpolated(grid, (height, width)).reshape(height * width, -1)
    front = [state["cls_token"][0] + positions[:1], *([state["register_tokens"][0]] if variant.registers else [])]
    x = np.concatenate([*front, tokens])
    if variant.normalised_first:
        x = layer_norm(x, state, "norm_pre", variant.epsilon)
    taps, first = {}, 1 + variant.registers
    for number in range(variant.depth):
        name = f"blocks.{number}"
        branch = attention(layer_norm(x, state, f"{name}.norm1", variant.epsilon), state, f"{name}.attn", variant.heads)
        x = x + branch * state.get(f"{name}.ls1.gamma", 1)
        branch = dense(layer_norm(x, state, f"{name}.norm2", variant.epsilon), state, f"{name}.mlp.fc1")
        branch = dense(activation(branch, variant.quick_gelu), state, f"{name}.mlp.fc2")
        x = x + branch * state.get(f"{name}.ls2.gamma", 1)
        taps[f"block{number + 1}"] = x[first:].reshape(height, width, -1)
    del taps[f"block{variant.depth}"]
    taps["s32"] = layer_norm(x, state, "norm", variant.epsilon)[first:].reshape(height, width, -1)
    return taps


def padded_conv(x, kernel, stride=1, dilation=1):
    """Convolution of [H, W, C] with a kernel [O, C, k, k] and as many zeros on each side as PyTorch's networks have."""
    reach = (kernel.shape[-1] - 1) * dilation
    x = np.pad(x, [(reach // 2,) * 2] * 2 + [(0, 0)])
    shape = [(side - reach - 1) // stride + 1 for side in x.shape[:2]]
    result = np.zeros((*shape, len(kernel)))
    for i, j in np.ndindex(*shape):
        window = x[i * stride :, j * stride :][: reach + 1 : dilation, : reach + 1 : dilation]
        result[i, j] = kernel.reshape(len(kernel), -1) @ window.transpose(2, 0, 1).ravel()
    return result


def resnet50(state, x, last_stride, counts=(3, 4, 6, 3)):
    """Taps of one image [H, W, 3]: convolution, batch norm and ReLU in turn."""
    state = {name: np.float64(array) for name, array in state.items()}

    def normalised(x, name):
        weight, bias, mean, variance = (state[f"{name}.{field}"] for field in ("weight", "bias", "running_mean", "running_var"))
        return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias

    def relu(x):
        return np.maximum(x, 0)

    x = relu(normalised(padded_conv(x, state["conv1.weight"], 2), "bn1"))
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    height, width = (-(-side // 2) for side in x.shape[:2])
    x = np.array([[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(width)] for i in range(height)])
    plan = {32: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)], 16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)],
            8: [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]}[last_stride]  # fmt: skip
    taps = {}
    for stage, (stride, first, later) in enumerate(plan):
        for block in range(counts[stage]):
            name, inputs = f"layer{stage + 1}.{block}.", x
            x = relu(normalised(padded_conv(x, state[name + "conv1.weight"]), name + "bn1"))
            step, dilation = (stride, first) if block == 0 else (1, later)
            x = relu(normalised(padded_conv(x, state[name + "conv2.weight"], step, dilation), name + "bn2"))
            x = normalised(padded_conv(x, state[name + "conv3.weight"]), name + "bn3")
            if block == 0:
                inputs = normalised(padded_conv(inputs, state[name + "downsample.0.weight"], step), name + "downsample.1")
            x = relu(x + inputs)
        taps[("s4", "s8", "s16", "s32")[stage]] = x
    return taps
