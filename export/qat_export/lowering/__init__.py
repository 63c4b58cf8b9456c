"""From a fine-tuned, fake-quantized torch network to the integer network.

``network`` has the function ``lower``, ``refusals`` the checks for networks that can't be lowered. Imports
the models and quantized modules of :mod:`qat`, and :mod:`qat_export.integer`. Begin with ``network``.
"""
