"""Defects of a data folder, to be found by its check-up or when it is loaded."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from heads.layout import read_png
from heads.people import PEOPLE_TABLE


def part(folder: Path, split: str, kind: str = "") -> Path:
    """Where the images of a split lie, or with kind "seg_" its masks."""
    return folder / f"keras_png_slices_{kind}{split}"


def save(path: Path, pixels: np.ndarray) -> None:
    """Writes any picture, also one that no data folder may have."""
    Image.fromarray(pixels).save(path)


def plant(folder: Path, defect: str) -> str:
    """Damages the folder, a noise_folder; returns what the check-up, or training, has to say of it."""
    train, validate, test = (part(folder, split) for split in ("train", "validate", "test"))
    masks, masks_of_test = part(folder, "train", "seg_"), part(folder, "test", "seg_")
    number_7, number_8, number_9 = (train / f"case_001_slice_{z}.nii.png" for z in (7, 8, 9))
    match defect:
        case "missing slice":
            number_7.unlink()
            return "case 1 slice 7"
        case "extra slice":
            save(train / "case_001_slice_32.nii.png", np.eye(64, dtype=np.uint8))
            return "case 1 slice 32"
        case "duplicate picture":
            shutil.copy(number_7, number_8)
            return "case_001_slice_8.nii.png = case_001_slice_7.nii.png"
        case "truncated PNG":
            path = validate / "case_002_slice_3.nii.png"
            path.write_bytes(path.read_bytes()[:-500])
            return "case_002_slice_3.nii.png"
        case "16 bits":
            save(number_9, np.full((64, 64), 300, np.uint16))
            return "case_001_slice_9.nii.png is 16-bit"
        case "colour":
            save(number_9, np.full((64, 64, 3), 30, np.uint8))
            return "case_001_slice_9.nii.png is colour"
        case "case in two splits":
            for path in test.iterdir():
                save(train / path.name, 255 - read_png(path))
            for path in masks_of_test.iterdir():
                shutil.copy(path, masks)
            return "cases in both train and test (1): 3"
        case "masks as images" | "swapped":
            for path in masks.iterdir():
                shutil.copy(path, train / path.name.replace("seg", "case"))
            return "these are the masks" if defect == "swapped" else "masks under the images' names"
        case "images as masks":
            for path in train.iterdir():
                shutil.copy(path, masks / path.name.replace("case", "seg"))
            return "masks with values other than 0, 85"
        case "wrong size":
            save(test / "case_003_slice_0.nii.png", np.ones((64, 60), np.uint8))
            return "60x64"
        case "black picture":
            save(test / "case_003_slice_0.nii.png", np.zeros((64, 64), np.uint8))
            return "1 images are entirely black"
        case "missing mask":
            (masks_of_test / "seg_003_slice_0.nii.png").unlink()
            return "case 3 slice 0"
        case "grey of 0 and 1":
            for path in train.iterdir():
                save(path, (read_png(path) > 128).astype(np.uint8))
            return "no pixel is brighter than 1 of 255"
        case "JPEG's background":
            for path in train.iterdir():
                save(path, np.where(read_png(path) < 128, read_png(path) % 4, read_png(path)).astype(np.uint8))
            return "of the pixels have grey 1 to 4"
        case "other names":
            number_7.rename(train / "case_001_slice_7.png")
            number_8.rename(train / "case_001_slice_8.nii.PNG")
            return "case_NNN_slice_Z.nii.png (2): case_001_slice_7.png, case_001_slice_8.nii.PNG"
        case "empty masks":
            for path in masks_of_test.iterdir():
                save(path, np.zeros((64, 64), np.uint8))
            return "test: all masks are empty"
        case "damaged table":
            (folder / PEOPLE_TABLE).write_text("ID,M/F\nOAS1_0001_MR1,F\n")
            return "has no columns ID"
        case "no training images":
            shutil.rmtree(train)
            return "train: no images"
        case "missing folder":
            shutil.rmtree(folder)
            return "noise is no folder"
        case "empty folder":
            shutil.rmtree(folder)
            folder.mkdir()
            return "noise has no case_NNN"
        case "odd number":
            number_7.rename(train / "case_001_slice_77777.nii.png")
            return "numbered up to 77777"
        case "wrong size in training":
            save(number_7, np.ones((50, 64), np.uint8))
            return "case_001_slice_7.nii.png is 64x50"
