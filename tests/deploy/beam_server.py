"""In Flink's environment: starts one of Beam's servers as the job would, calls it as a Python worker
would, and prints where it listens, and the method that it does not know. Run by deploy.flink."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc

from stream_job import gateway

if __name__ == "__main__":
    java = gateway.start(Path(os.environ["TALLY_FLINK_CLASSES"])).jvm
    url = java.org.apache.beam.model.pipeline.v1.Endpoints.ApiServiceDescriptor.newBuilder()
    factory = java.org.apache.beam.sdk.fn.server.ServerFactory.createDefault()
    server = factory.allocateAddressAndCreate(java.java.util.ArrayList(), url)
    with grpc.insecure_channel(url.getUrl()) as channel:
        call: Any = channel.unary_unary("/no.such.Service/Method")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            print(f"{url.getUrl()} {error.details()}")
    server.shutdownNow()
