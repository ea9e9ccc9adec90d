"""Batch inference on several hosts."""

import re

from hosts import Hosts


def refuses_what_is_not_shared(hosts: Hosts, shared: str, model: str) -> None:
    """Classifies images that only the head sees, to a folder that only it sees, and then what all hosts see."""

    def predict(images: str, output: str) -> str:
        options = "--part-rows 2 --tracking-uri $MLFLOW_TRACKING_URI"
        command = f"python -m pipeline.predict {model} {images} {output} {options}"
        text = hosts.ssh(hosts.head, f"cd ~/keras-perceiver-ray; {command} 2>&1 || true", timeout=300).text
        return " ".join(text.split())

    code = "from PIL import Image; [Image.new('L', (8, 8), i).save(f'{i}.png') for i in range(20)]"
    for folder in ("~/images", f"{shared}/images"):
        hosts.ssh(hosts.head, f'mkdir {folder}; cd {folder}; python -c "{code}"')
    refused = predict("~/images", f"{shared}/classified")
    assert re.search(r"error: input = '/home/ray/images': node 10\.77\.0\.1[12] cannot read", refused), refused
    refused = predict(f"{shared}/images", "~/classified")
    found = re.search(r"error: output = '/home/ray/classified': node 10\.77\.0\.1[12] sees another folder", refused)
    assert found, refused
    done = predict(f"{shared}/images", f"{shared}/classified")
    assert "20 images done, 0 of them could not be read" in done, done
