"""To be written."""

from fastapi import APIRouter, Request

from megalith.generation.params import GenerationParams
from megalith.serving.disconnects import while_connected


def router(service):
    r = APIRouter()

    @r.put("/api")
    async def api(request: Request):
        body = await request.json()
        with await service.submit(
            body["prompts"], GenerationParams(max_new_tokens=body.get("tokens_to_generate", 64))
        ) as submission:
            async with while_connected(request):
                completions = await submission.completions()
        return {"text": [each.text for each in completions]}

    return r
