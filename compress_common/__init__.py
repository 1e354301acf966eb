# SPDX-License-Identifier: Apache-2.0
"""What the other packages share: errors for users, classes by name, and the store. No torch."""
