"""Conversion factors between units; a factor `A_PER_B` times a number of B is a number of A."""

BITS_PER_BYTE = 8
BYTES_PER_KIB = 1024
BYTES_PER_MIB = 1024 * BYTES_PER_KIB

PJ_PER_FJ = 1e-3
PJ_PER_NJ = 1e3
PJ_PER_UJ = 1e6
PJ_PER_J = 1e12

HZ_PER_MHZ = 1e6
HZ_PER_GHZ = 1e9

OPERATIONS_PER_GOP = 1e9

NS_PER_S = 1e9
US_PER_S = 1e6
MS_PER_S = 1e3

# One milliwatt is 1e-3 J/s.
MILLIWATT_PER_WATT = 1e3
PJ_PER_S_PER_MILLIWATT = 1e9

UM2_PER_MM2 = 1e6
