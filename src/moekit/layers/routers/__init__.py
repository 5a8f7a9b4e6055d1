"""Routers, one idea a module; each registers a factory of kind "router"."""
