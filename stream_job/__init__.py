"""The stream: events from Kafka, through Flink, into both stores. And what people do with it.

`pipeline` and `applier` run in Flink's environment; `topics`, `publish`, `watch`, `dead_letters` and
the commands in the main one.
"""
