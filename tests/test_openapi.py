"""The description of the routes: all of them, as they are, and valid."""

import json

import pytest
from described_app import BLUEPRINTS, PATHS, described_app
from flask_apps import make_app, scripted
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from rendering import WIRES

from flask_llmstream import QueueFullError, exceptions


@pytest.fixture(scope="module")
def app():
    return described_app()


@pytest.fixture(scope="module")
def description(app):
    return describe(app)


def describe(app, path="/openapi.json", **options):
    response = app.test_client().get(path, **options)
    assert response.status_code == 200
    assert response.content_type == "application/json"
    return response.json


def operations(description):
    return {
        (path, method): operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }


def validator(description, reference):
    """Of the schema at *reference* in *description*."""
    resource = Resource(contents=description, specification=DRAFT202012)
    return Draft202012Validator(
        {"$ref": f"urn:api{reference}"}, registry=Registry().with_resource("urn:api", resource)
    )


def test_it_is_valid(description):
    OpenAPIV31SpecValidator(description).validate()


def test_it_is_valid_with_keys_and_streams_that_are_kept():
    app = described_app(api_keys="secret", resume_seconds=30)
    OpenAPIV31SpecValidator(describe(app)).validate()


def test_it_has_every_route_of_the_package_and_no_other():
    app = described_app()
    app.get("/mine")(lambda: "")
    served = {
        (rule.rule.replace("<path:", "{").replace("<", "{").replace(">", "}"), method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if "." in rule.endpoint
    }
    assert set(operations(describe(app))) == served
    assert len(served) >= 25


def test_it_is_the_same_every_time():
    bodies = {described_app().test_client().get("/openapi.json").data for _ in range(3)}
    assert len(bodies) == 1


def test_every_route_says_what_it_does(description):
    for place, operation in operations(description).items():
        assert operation["summary"], place


def test_each_operation_has_a_name_of_its_own(description):
    ids = [operation["operationId"] for operation in operations(description).values()]
    assert len(set(ids)) == len(ids)
    assert {"llmstream.stream", "llmstream.stream_2"} <= set(ids)


def test_no_name_shows_what_is_private(description):
    names = [name for group in description["components"].values() for name in group]
    assert not [name for name in names if "._" in name]
    assert "#/components/schemas/_" not in json.dumps(description)


every_dialect = pytest.mark.parametrize(
    "wire", {wire.dialect.name: wire for wire in WIRES}.values(), ids=lambda wire: wire.dialect.name
)


def test_every_dialect_is_tried_here():
    assert {wire.dialect.name for wire in WIRES} == set(PATHS)


@every_dialect
def test_a_body_that_is_answered_fits_its_schema_and_one_that_is_refused_does_not(
    app, description, wire
):
    path = PATHS[wire.dialect.name]
    body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = validator(description, body["schema"]["$ref"])
    client = app.test_client()
    for fields in ({}, {"temperature": 0.5, "stream": False}, {"stream": None}):
        assert client.post(path, json={**wire.body, **fields}).status_code == 200
        assert schema.is_valid({**wire.body, **fields})
    for fields in ({"stream": "yes"}, {"model": 7}, {"messages": "Hi", "prompt": 7, "input": 7}):
        assert client.post(path, json={**wire.body, **fields}).status_code == 400
        assert not schema.is_valid({**wire.body, **fields})


@every_dialect
def test_an_answer_has_one_of_the_media_types_that_are_told(app, description, wire):
    path = PATHS[wire.dialect.name]
    told = description["paths"][path]["post"]["responses"]["200"]["content"]
    given = set()
    for accept in ("text/event-stream", "application/x-ndjson", "text/plain", "application/json"):
        fields = {"stream": accept != "application/json"}
        answer = app.test_client().post(
            path, json={**wire.body, **fields}, headers={"Accept": accept}
        )
        given.add(answer.content_type)
    assert given == set(told)


@every_dialect
def test_an_error_fits_its_schema(description, wire):
    path = PATHS[wire.dialect.name]
    app = described_app(QueueFullError("busy"))
    for body, status in ((b"{", 400), (json.dumps(wire.body), 429)):
        answer = app.test_client().post(path, data=body)
        assert answer.status_code == status
        name = description["paths"][path]["post"]["responses"][str(status)]["$ref"].split("/")[-1]
        told = description["components"]["responses"][name]
        schema = told["content"][answer.content_type]["schema"]["$ref"]
        validator(description, schema).validate(answer.json)
        assert set(told["headers"]) <= set(answer.headers.keys())


def test_every_status_and_code_of_the_error_tree_is_told(description):
    told = description["components"]["responses"]
    for name in exceptions.__all__:
        cls = getattr(exceptions, name)
        if cls.status is not None:
            assert cls.code in told[f"openai.{cls.status}"]["description"].split(", ")


def test_where_no_model_is_asked_only_what_can_happen_is_told(description):
    responses = description["paths"]["/v1/models/{model}"]["get"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "413"}
    assert set(description["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}
    resume = description["paths"]["/api/ai/{chat_id}/stream"]["get"]["responses"]
    assert "content" not in resume["204"]


def parameters(operation):
    return [
        parameter.get("name") or parameter["$ref"].split("/")[-1]
        for parameter in operation["parameters"]
    ]


def test_headers_and_places_in_the_path_are_told(description):
    paths = description["paths"]
    assert parameters(paths["/stream"]["post"]) == ["request_id", "request_timeout"]
    assert parameters(paths["/stream/{id}"]["delete"]) == ["id", "request_id"]
    assert parameters(paths["/healthz"]["get"]) == []


def test_where_streams_are_kept_it_tells_how_to_come_back():
    paths = describe(described_app(resume_seconds=30))["paths"]
    assert "last_event_id" in parameters(paths["/stream"]["post"])
    assert "204" in paths["/stream"]["post"]["responses"]
    assert "last_event_id" not in parameters(paths["/v1/models"]["get"])


def test_a_key_is_told_where_one_is_needed():
    llm, _ = scripted()
    app = make_app(llm)
    app.register_blueprint(llm.native_blueprint())
    app.register_blueprint(llm.native_blueprint(name="locked", api_keys="x"), url_prefix="/locked")
    app.register_blueprint(llm.ops_blueprint())
    paths = describe(app)["paths"]
    assert paths["/locked"]["post"]["security"] == [{"bearer": []}, {"api_key": []}]
    assert "security" not in paths["/stream"]["post"]
    assert "security" not in paths["/healthz"]["get"]
    assert {} in paths["/llmstream/stats"]["get"]["security"]


def test_it_says_where_the_app_is_mounted(app):
    assert describe(app)["servers"] == [{"url": "/"}]
    mounted = describe(app, environ_overrides={"SCRIPT_NAME": "/llm"})
    assert mounted["servers"] == [{"url": "/llm"}]


def test_of_two_blueprints_at_one_place_the_one_that_answers_is_told():
    llm, _ = scripted()
    app = make_app(llm)
    for name in ("openai", "anthropic", "ops"):
        app.register_blueprint(getattr(llm, f"{name}_blueprint")())
    description = describe(app)
    OpenAPIV31SpecValidator(description).validate()
    assert description["paths"]["/v1/streams/{id}"]["delete"]["tags"] == ["openai"]
    assert description["paths"]["/v1/messages"]["post"]["tags"] == ["anthropic"]


def test_every_blueprint_is_tried_here():
    from flask_llmstream import LLMStream

    assert {
        name.removesuffix("_blueprint") for name in dir(LLMStream) if "_blueprint" in name
    } == set(BLUEPRINTS)
