"""The bundled backends; each module or package declares its own by the public hook."""
