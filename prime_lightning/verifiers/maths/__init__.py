"""Is a mathematical answer the reference?"""
