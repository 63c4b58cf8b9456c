"""Read once by the server of fork_server.py, so that processes forked from it have it in memory."""

from qat.data.loading import load_splits
from qat.recipe.schema import Data

load_splits(Data(image_size=8))  # the digits, as toys are given them
