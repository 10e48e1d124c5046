"""Models as ONNX graphs of one tile's size, run by onnxruntime, OpenVINO or PyTorch with one `encode` and `decode`.

    from mg.deploy import load                      # needs neither MindSpore nor a model

    vae = load("outputs/tae_onnx", engine="openvino")
    z, mean, logvar = vae.encode(x)                 # numpy arrays
    y = vae.decode(z, num_target_frames=x.shape[2])

`mg-export` writes such a folder; see `mg.deploy.export`.
"""

from mg.deploy.autoencoder import DeployedAutoencoder, Encoded, load
from mg.deploy.counting import operations

__all__ = ["DeployedAutoencoder", "Encoded", "load", "operations"]
