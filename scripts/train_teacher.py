"""accelerate launch scripts/train_teacher.py recipes/cifar100/teachers/resnet56.yaml [--key value ...]"""

from hfkd.run import train_teacher

if __name__ == "__main__":
    train_teacher()
