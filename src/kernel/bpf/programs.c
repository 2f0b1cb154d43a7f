// The programs of the kernel path: one object, so that all have the same maps.

#include "connect.c"
#include "udp.c"

// No helper is used that needs a GPL-compatible licence.
char _license[] SEC("license") = "Apache-2.0";
