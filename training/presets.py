"""The presets: sizes and lengths that belong together. A typed flag beats its preset's value.

base is sized by work: each stage takes at most four hours of a T4 that reaches 4 TFLOP/s (counted in
tests/training/test_presets.py). demo is sized by processor seconds: `make demo` ends within ten minutes on two cores
without AVX-512.
"""

MEANINGS = {"demo": "64 px, minutes on a CPU", "small": "256 px, hours on a CPU", "base": "256 px, hours on a CUDA GPU"}

# {script: {preset: {flag: value}}}; another preset is a meaning and a row for each script.
PRESETS: dict[str, dict[str, dict]] = {
    "prestage_train.py": {
        "demo": {"image_size": 64, "patch": 4, "widths": (32, 64), "blocks": 1, "codebook_size": 256,
                 "steps": 400, "batch_size": 16, "learning_rate": 1e-3, "gan_weight": 0.0},
        "small": {"image_size": 256, "patch": 8, "widths": (128,), "blocks": 3, "codebook_size": 1024,
                  "steps": 24_000, "batch_size": 4, "learning_rate": 8e-4, "gan_weight": 1.0},
        "base": {"image_size": 256, "patch": 4, "widths": (96, 192), "blocks": 3, "codebook_size": 1024,
                 "steps": 54_000, "batch_size": 32, "learning_rate": 3e-4, "gan_weight": 1.0},
    },
    "stable_diffusion.py": {
        "demo": {"widths": (64, 128), "slices": 8, "moved_heads": 0,
                 "steps": 300, "batch_size": 32, "learning_rate": 5e-4},
        "small": {"widths": (64, 128, 192), "slices": 8, "moved_heads": 6,
                  "steps": 20_000, "batch_size": 32, "learning_rate": 1e-3},
        "base": {"widths": (128, 256, 384), "slices": 8, "moved_heads": 6,
                 "steps": 14_000, "batch_size": 128, "learning_rate": 2e-4},
    },
    "pixelCNN.py": {
        "demo": {"channels": 48, "layers": 6, "steps": 300, "batch_size": 16, "learning_rate": 1e-3},
        "small": {"channels": 64, "layers": 8, "steps": 2400, "batch_size": 16, "learning_rate": 8e-4},
        "base": {"channels": 128, "layers": 12, "steps": 20_000, "batch_size": 64, "learning_rate": 3e-4},
    },
}  # fmt: skip
