"""From a checkpoint to a bundle: trace, bind weights, write, verify."""
