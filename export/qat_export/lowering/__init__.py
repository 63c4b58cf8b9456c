"""From a fine-tuned, fake-quantized torch network to the integer network.

``network`` holds ``lower``, ``refusals`` what it refuses to express. Imports the models and quantized modules
of :mod:`qat`, and :mod:`qat_export.integer`. Begin with ``network``.
"""
