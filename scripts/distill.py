"""accelerate launch scripts/distill.py recipes/cifar100/resnet56-resnet20/kd_zscore.yaml [--key value ...]"""

from hfkd.run import distill

if __name__ == "__main__":
    distill()
