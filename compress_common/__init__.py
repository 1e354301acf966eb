# SPDX-License-Identifier: Apache-2.0
"""What the other packages share: errors for users, classes by name, and the store. No torch.

The packages inside need torch and transformers. They read checkpoints, follow the structure of a
decoder, run it over calibration text and search.
"""
