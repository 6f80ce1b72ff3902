"""One module an executor; each offers `edge.executor.Executor`."""
