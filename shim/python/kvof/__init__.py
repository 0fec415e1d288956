"""Context blocks in NVMe Key Value namespaces, over fabrics: a client over libkvof.so, and adapters for inference engines.

    with kvof.Client("tcp://127.0.0.1/nqn.2026-11.dev.kvof:embedded") as client:
        client.put("block", data)
        size = client.get_into("block", buffer)

kvof.lmcache, kvof.sglang and kvof.vllm are loaded by the engines themselves; see docs/ of the project.
"""

from ._abi import Kind, Status
from .client import Batch, Client, KvofError, Memory, NvmeKey, Options, Queue, nvme_key

__all__ = ["Batch", "Client", "Kind", "KvofError", "Memory", "NvmeKey", "Options", "Queue", "Status", "nvme_key"]
