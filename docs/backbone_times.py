"""Time and memory of a forward pass of every backbone, beside PyTorch's of the same network.

    OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. .venv/bin/python docs/backbone_times.py compare "torch_env/bin/python docs/backbone_times.py" [PART OF A NAME]

prints the table of docs/backbones.md. Two processes, of PyTorch (see docs/parity.py) and of this project, are asked in turns; numbers are random.
Wall and CPU seconds are each the least of all turns; memory is by how much the process grows in its first pass, compiled before.
"""

import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import parity

CASES = {
    **{f"efficientnet_lite{size}": f"efficientnet_lite{size}" for size in range(5)}, "vgg16": "vgg16", "resnet50": "resnet50_16",
    **{name: name for name in ("dinov2_vits14", "dinov2_vitb14", "dinov2_vits14_reg", "clip_vitb16", "augreg_vits16", "augreg_vitb16")},
}  # fmt: skip
SIDES, TURNS, PASSES = (320, 518), 3, 2


def side_of(name, side):
    """The nearest side that the backbone takes, at most `side` and 2 pixels more."""
    step = {"dinov2": 14, "clip_v": 16, "augreg": 16}.get(name[:6], 1)
    return side if step == 1 else (side + 2) // step * step


def torch_forward(name, side):
    """A function that does one pass, of PyTorch."""
    import torch

    torch.set_num_threads(2)
    model, taps = parity.CASES[CASES[name]][-1]()
    x = torch.randn(1, 3, side, side)

    def forward():
        with torch.no_grad():
            if hasattr(model, "save_pretrained"):
                options = {"interpolate_pos_encoding": True} if name.startswith("clip") else {}
                model(pixel_values=x, **options)
            elif hasattr(model, "forward_intermediates") and "vit" in name:
                model.forward_features(x)
            else:
                taps(x)

    return forward


def jax_forward(name, side):
    """A function that does one pass, of this project."""
    import jax

    from lcrf_jax.nets.network import BACKBONES
    last_stride = parity.CASES[CASES[name]][1]
    module = BACKBONES[name].module(last_stride=last_stride)
    taps = ("s32",) if "vit" in name else parity.STAGES
    x = np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(np.float32) * 0.02), shapes)

    def chosen(variables, x):
        found = module.apply(variables, x)
        return {tap: found[tap] for tap in taps}

    program = jax.jit(chosen).lower(variables, x).compile()
    return lambda: jax.block_until_ready(program(variables, x))


def memory(field):
    """MiB of this process, from /proc."""
    [line] = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def serve(make):
    """Answer lines "name side" by "wall cpu memory" of the best of a few passes."""
    ready = {}
    for line in sys.stdin:
        name, side = line.split()
        grown = 0.0
        if line not in ready:
            ready.clear()  # one network at a time
            ready[line] = make(name, int(side))
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory("VmRSS")
            ready[line]()
            grown = memory("VmHWM") - before
        times = []
        for _ in range(PASSES):
            wall, cpu = time.perf_counter(), time.process_time()
            ready[line]()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        print("answer", *np.min(times, axis=0), grown, flush=True)


def asked(process, name, side):
    """(wall, cpu, memory) of one turn."""
    process.stdin.write(f"{name} {side}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("answer"):
            return [float(number) for number in line.split()[1:]]
    sys.exit(f"error: no answer for {name} at {side}")


def compare(torch_command, part=""):
    """The table."""
    ours = f"{sys.executable} {__file__}"
    processes = [
        subprocess.Popen(shlex.split(f"{command} serve-{kind}"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command, kind in ((ours, "jax"), (torch_command, "torch"))
    ]
    print("| backbone | side | wall, s: ours, PyTorch | CPU, s: ours, PyTorch | ratio of CPU | MiB: ours, PyTorch |\n|---|---|---|---|---|---|")
    for name in CASES:
        for side in (side_of(name, side) for side in SIDES if part in name):
            turns = np.array([[asked(process, name, side) for process in processes] for _ in range(TURNS)])
            (wall, cpu, _), most = turns.min(axis=0).T, turns[..., 2].max(axis=0)
            print(f"| `{name}` | {side} | {wall[0]:.2f}, {wall[1]:.2f} | {cpu[0]:.2f}, {cpu[1]:.2f} | {cpu[0] / cpu[1]:.2f} | "
                  f"{most[0]:.0f}, {most[1]:.0f} |", flush=True)  # fmt: skip
    for process in processes:
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"] and len(sys.argv) in (3, 4):
        compare(*sys.argv[2:])
    elif sys.argv[1:] in (["serve-jax"], ["serve-torch"]):
        serve(jax_forward if sys.argv[1] == "serve-jax" else torch_forward)
    else:
        sys.exit('error: expected compare "COMMAND OF PYTORCH", and perhaps a part of a name')
