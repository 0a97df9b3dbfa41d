"""Right kernels that compute in other ways: a plugin, declared without torch."""
