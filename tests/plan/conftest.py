"""Eight fake CPU devices, as the tests of the executor have them: rules are tried on two."""

import jax

jax.config.update("jax_num_cpu_devices", 8)  # at collection, before any test has used a device
