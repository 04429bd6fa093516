"""The shape of a LeaderWorkerSet (leaderworkerset.x-k8s.io/v1), as far as its own fields go.

The schema of this custom resource is in no package that Kubernetes' own schemas come with. Its fields, their enums and
which of them are required are those of the project's API (`api/leaderworkerset/v1`); pod templates are Kubernetes' own
and are checked as such by whoever uses this.
"""

from __future__ import annotations

from typing import Any


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_COUNT = {"type": "integer", "minimum": 0}
_COUNT_OR_SHARE = {"anyOf": [_COUNT, {"type": "string", "pattern": r"^\d+%$"}]}
_POD_TEMPLATE = {"type": "object", "required": ["spec"]}

SCHEMA = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=_object(
        ["leaderWorkerTemplate"],
        replicas=_COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        networkConfig=_object(["subdomainPolicy"], subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
        rolloutStrategy=_object(
            ["type"],
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_object(
                [], partition=_COUNT, maxUnavailable=_COUNT_OR_SHARE, maxSurge=_COUNT_OR_SHARE
            ),
        ),
        leaderWorkerTemplate=_object(
            ["workerTemplate"],
            leaderTemplate=_POD_TEMPLATE,
            workerTemplate=_POD_TEMPLATE,
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            subGroupPolicy=_object(
                [],
                subGroupPolicyType={"enum": ["LeaderWorker", "LeaderExcluded"]},
                subGroupSize={"type": "integer", "minimum": 1},
            ),
            volumeClaimTemplates={"type": "array", "items": {"type": "object"}},
            persistentVolumeClaimRetentionPolicy={"type": "object"},
        ),
    ),
)
