"""What layers and models hold besides a config, and how it is carried on."""
