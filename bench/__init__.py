"""The benchmark: this product beside the designs it is measured against, in one run on one machine."""
