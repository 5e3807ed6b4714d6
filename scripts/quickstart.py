"""Train a teacher and three students on scikit-learn's digits and print one table.

`bash scripts/quickstart.sh` installs hfkd and runs this script.
"""

import json
import shutil
import time

from hfkd.commands.train import distill, train_teacher

STUDENTS = {"cross-entropy alone": "student", "KD": "kd", "KD + Z-score": "kd_zscore"}


def main() -> None:
    started = time.perf_counter()
    for name in ("teacher", *STUDENTS.values()):
        shutil.rmtree(f"runs/digits/{name}", ignore_errors=True)
    train_teacher(["digits/teacher"])
    rows = [("teacher, ResNet-20", "runs/digits/teacher")]
    for title, name in STUDENTS.items():
        distill([f"digits/{name}"])
        rows.append((f"student, ResNet-8, {title}", f"runs/digits/{name}"))
    print(f"\n{'digits':40s} {'parameters':>10s} {'top-1':>7s} {'agreement':>10s} {'seconds':>8s}")
    for title, folder in rows:
        with open(f"{folder}/results.json") as file:
            result = json.load(file)
        agreement = result["last"].get("agreement")
        print(
            f"{title:40s} {result['parameters']:10,d} {result['last']['top1']:7.2f} "
            f"{'' if agreement is None else f'{agreement:.2f}':>10s} {result['seconds']:8.1f}"
        )
    print(
        f"\nTop-1 after the last epoch and agreement with the teacher, in percent. All in runs/digits, in "
        f"{time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
