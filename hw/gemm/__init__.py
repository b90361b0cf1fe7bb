"""Dense layers on a memory hierarchy and an array: machines as data, mappings, cost, search for mappings."""
