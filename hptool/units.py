"""Units. The only place where a power of two or ten stands for a prefix.

Capacities are binary (GiB), rates are decimal (GB/s, TFLOP/s), as data sheets give them.
"""

GIB = 2**30
MIB = 2**20
GB = 10**9
TERA = 10**12
MILLI = 1e-3
MICRO = 1e-6

SECONDS_PER_MINUTE = 60
MINUTES_PER_HOUR = 60
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 86_400
