import runcomfy

with runcomfy.connect() as comfy:
    result = comfy.run("generate_flux_mesh", image="examples/render.png", prompt="a helmet of polished steel")
    for output in result.outputs:
        print(output.kind, output.path, output.sha256)
    print(f"cost ${result.cost_usd}")
