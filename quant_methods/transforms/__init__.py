# SPDX-License-Identifier: Apache-2.0
"""Changes of the weights that leave the function of the model as it is."""
