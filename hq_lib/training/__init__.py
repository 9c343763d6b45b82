"""One loop for float and quantization-aware training, and one evaluation."""

from hq_lib.training.config import TrainConfig
from hq_lib.training.evaluation import Evaluation, evaluate, predict
from hq_lib.training.loop import FitResult, fit
from hq_lib.training.recipes import QatRecipe, qat_recipe, recipe
