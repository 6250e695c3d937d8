"""Eight fake CPU devices for every test in this process, set at collection, before any test has used a device."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
