"""The Java of the job's mini-cluster: its commands come through a gateway that asks for a token.

PyFlink would start Java with a gateway that takes commands, which run as us, from every process of the
machine, and would listen itself for calls from Java, just as openly. The job needs no such calls. So Java
is started by Py4J's own launcher: it draws a token, which comes back through a pipe.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
from pyflink import java_gateway, pyflink_gateway_server
from pyflink.util.exceptions import install_exception_handler, install_py4j_hooks

LOG_SETTINGS = "log4j.properties"
"""In the folder for temporary files: Java's settings of its log, where a start has its own."""


def start(classes: Path) -> JavaGateway:
    """Starts Java, which ends with this process, and has PyFlink use it from now on.

    Args:
        classes: a folder of classes that come before those in jars.
    """
    temporary = short_name(Path(tempfile.gettempdir()))
    if Path(temporary, LOG_SETTINGS).exists():
        os.environ["LOG4J_PROPERTIES"] = f"{temporary}/{LOG_SETTINGS}"
    pyflink_gateway_server.prepare_environment_variables(os.environ)
    in_jars = pyflink_gateway_server.construct_flink_classpath(os.environ)
    options = [
        "--add-opens=jdk.proxy2/jdk.proxy2=ALL-UNNAMED",
        *pyflink_gateway_server.get_jvm_opts(os.environ),
        *pyflink_gateway_server.construct_log_settings(os.environ),
        f"-Djava.io.tmpdir={temporary}",
    ]
    try:
        port, token = launch_gateway(
            classpath=f"{classes}:{in_jars}",
            javaopts=options,
            java_path=pyflink_gateway_server.find_java_executable(),
            die_on_exit=True,
            enable_auth=True,
            redirect_stdout=sys.stdout,
            redirect_stderr=sys.stderr,
        )
    except ValueError:  # instead of its port it said what is wrong, or nothing
        sys.exit("Java does not start: what it says of that stands above")
    parameters = GatewayParameters(port=port, auth_token=token, auto_convert=True)
    gateway = JavaGateway(gateway_parameters=parameters)
    java_gateway.import_flink_view(gateway)
    java_gateway._gateway = gateway  # where PyFlink keeps the one that it started
    install_exception_handler()
    install_py4j_hooks()
    return gateway


def short_name(folder: Path) -> str:
    """Another name of a folder, for as long as this process lives. It has no blanks, which PyFlink's
    scripts do not expect, and is short: the names of Unix sockets in it end after 107 bytes."""
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"
