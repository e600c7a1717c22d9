from mmrl import torchvision_shim

torchvision_shim.install()
