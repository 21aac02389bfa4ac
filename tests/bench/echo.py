"""A bare grpc.aio server that answers every call with the same bytes: the roof of what can be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
import uvloop


async def serve(response: bytes) -> None:
    """Serves until killed; prints its port."""

    async def echo(request: bytes, context: Any) -> bytes:
        return response

    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    service = grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]).read_bytes()))
