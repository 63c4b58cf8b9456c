from qat.api.exports import export_onnx as export_onnx
from qat.api.exports import verify as verify
from qat.api.networks import calibrate as calibrate
from qat.api.networks import freeze as freeze
from qat.api.networks import load as load
from qat.api.networks import prepare as prepare
from qat.api.networks import save as save
from qat.api.runs import evaluate as evaluate
from qat.api.runs import finetune as finetune
from qat.api.runs import pretrain as pretrain
from qat.checkpoints.loading import load_state as load_state
from qat.errors import QatError as QatError
from qat.models.bnext import Architecture as Architecture
from qat.models.bnext import BNext as BNext
from qat.quantize.preparation import quantization_map as quantization_map
from qat.recipe.loading import load_recipe as load_recipe
from qat.recipe.schema import Quantization as Quantization
from qat.recipe.schema import Recipe as Recipe

__version__: str
