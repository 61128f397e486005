"""The reward `code`: answers that are programs, run on the tests of their problem in a sandbox."""
