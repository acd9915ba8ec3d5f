"schemathesis reads the OpenAPI document and tries everything that it allows, and much that it does not."

import pytest

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install 'snn[test]'"
)

from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import small_model

from snn.data.models import write
from snn.serve.addresses import Network
from snn.serve.api import Settings, create
from snn.serve.model import Live, Sources

OPERATIONS = [
    "GET /image",
    "POST /predict",
    "GET /healthz",
    "GET /readyz",
    "GET /model",
    "GET /metrics",
]

# Left out: "what fits the schema must be accepted". No schema can say which bytes are a picture, or which address leads to one.


async def nobody(host, port):
    return []  # no name has a number, so nothing is ever connected to


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "params.h5"
    write(small_model(), path)
    return schemathesis.openapi.from_asgi(
        "/openapi.json", create(Live(Sources(path)), Settings(network=Network(resolve=nobody)))
    )


def operations(schema):
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


def test_every_path_of_the_document_is_tried(schema):
    assert sorted(operations(schema)) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    "label, mode",
    [
        *((label, GenerationMode.POSITIVE) for label in OPERATIONS),
        *((label, GenerationMode.NEGATIVE) for label in OPERATIONS[:2]),
    ],
)
def test_the_api_does_what_its_document_says(schema, label, mode):
    operation = operations(schema)[label]

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
