# SPDX-License-Identifier: Apache-2.0
"""What compression loses: keys that are asked for, and text that is gone on with."""
