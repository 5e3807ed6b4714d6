"""python scripts/evaluate.py runs/.../student [--dataset_name ... --eval_split ...]"""

from hfkd.run import evaluate

if __name__ == "__main__":
    evaluate()
