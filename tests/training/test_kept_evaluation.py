"""The teacher's evaluation is kept from one run to the next, and believed only where it is the same teacher's."""

import datasets
import pytest
import torch
from helpers import results_of

from hfkd import DistillationConfig, DistillationTrainer, load_student
