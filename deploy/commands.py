"""What `tally --help` says of the operator's commands, without importing them.

A test holds each line to the command's own help.
"""

HELP = {
    "batch": "Compute exact features of every transaction, in place of those on arrival.",
    "config": "List the settings of the server and the stream: environment name, value now, meaning.",
    "dead-letters": "Events that could not be applied: list them, look at one, publish them again.",
    "down": "Stop the stack of a data folder, even one that is still starting; its data stays.",
    "erase": "Remove a card from Redis and Postgres, and keep its past out when it is brought again.",
    "load": "Load transactions in Kaggle format into Postgres and Redis.",
    "prepare": "Make both stores and the topics ready: schema, functions, topics; Redis rebuilt if it was lost.",
    "publish": "Publish a file's transactions and labels to Kafka, as a payment system would.",
    "status": "Say whether the stack is up, where, and what its stores are worth.",
    "up": "Start the stack in a data folder, and wait until its stores, Kafka and the server answer.",
    "verify": "Recompute features from Postgres and compare them with what is served.",
}
