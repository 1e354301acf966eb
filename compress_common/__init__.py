# SPDX-License-Identifier: Apache-2.0
"""What the other packages share: errors that users read, and classes by name. Needs pydantic."""
