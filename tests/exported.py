"""ONNX files as `hfkd export` leaves them beside a student, written without an export."""

import json
from pathlib import Path

from hfkd.runs.onnx_files import onnx_folder, weights_digest

MEASURED = {
    "float32": {"top1": 70.273, "agreement": 100.0, "bytes": 3_689_447, "ms_1_thread": 2.671, "ms_all_threads": 6.69},
    "float16": {"top1": 70.301, "agreement": 99.94, "ms_1_thread": 2.49, "ms_all_threads": 6.78},
    "int8": {"top1": 70.084, "agreement": 97.791, "ms_1_thread": 1.36, "ms_all_threads": 3.15},
}


def onnx_file(student, precision, content=b"weights of the file", **facts):
    """Write a file and its description, as of the weights in the student's folder; return its path."""
    path = Path(student).parent / onnx_folder(precision) / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    known = {"image_size": 32, "top1": 70.2, "weights": weights_digest(Path(student))}
    if precision != "float32":
        own = MEASURED[precision] | {"bytes": len(content)}
        known |= {"precision": precision, "measured": {"float32": MEASURED["float32"], precision: own}}
    (path.parent / "preprocessing.json").write_text(json.dumps(known | facts))
    return path
