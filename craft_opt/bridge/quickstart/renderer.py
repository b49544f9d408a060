"""A camera without OpenGL: one ray a pixel through MuJoCo's own ray casting, Lambert shading.

A machine without a screen and without EGL can render nothing through OpenGL, and software OpenGL with
shadows gives 8 frames a second. Casting 64x64 rays gives about ten times that, and is exact geometry.
"""

import mujoco
import numpy as np
from numpy.typing import NDArray

# MuJoCo's default view shows the groups 0 to 2; MetaWorld keeps its collision shapes in group 4.
_VISIBLE_GROUPS = np.array([1, 1, 1, 0, 0, 0], dtype=np.uint8)
_LIGHT = np.array([0.35, -0.55, 0.76])  # a unit vector from the scene towards the light
_AMBIENT = 0.45
_BACKGROUND = np.array([70, 90, 110], dtype=np.uint8)
_MAX_DISTANCE = 20.0


class RayRenderer:
    """Renders one camera of a MuJoCo model on the CPU.

        ray(u, v) = R_cam · (tan(fovy/2)·u, tan(fovy/2)·v, -1),   u, v in (-1, 1) at pixel centres
        colour    = rgba of the geom hit · (ambient + (1 - ambient) · |normal · light|)

    Args:
        model: The compiled model; colours and textures are read once.
        camera: Name of the camera.
        side: Width and height of the image in pixels.

    Raises:
        ValueError: If the model has no such camera, or side is not positive.
    """

    def __init__(self, model: mujoco.MjModel, camera: str, side: int) -> None:
        self._camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self._camera < 0:
            names = [model.camera(index).name for index in range(model.ncam)]
            raise ValueError(f"camera {camera!r} is not in the model; it has {names}")
        if side < 1:
            raise ValueError(f"side is {side}; it must be at least 1 pixel")
        self._model = model
        self._side = side
        half = np.tan(np.deg2rad(model.cam_fovy[self._camera]) / 2)
        centres = (2 * np.arange(side) + 1) / side - 1
        u, v = np.meshgrid(half * centres, -half * centres)
        rays = np.stack([u, v, -np.ones_like(u)], axis=-1).reshape(-1, 3)
        self._rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
        self._colours = _geom_colours(model)
        self._geom = np.empty(side * side, dtype=np.int32)
        self._distance = np.empty(side * side)
        self._normal = np.empty(side * side * 3)

    def render(self, data: mujoco.MjData) -> NDArray[np.uint8]:
        """Render the state ``data`` is in, after ``mj_forward``.

        Returns:
            Image [side, side, 3], first row at the top.
        """
        rotation = data.cam_xmat[self._camera].reshape(3, 3)
        mujoco.mj_multiRay(
            self._model,
            data,
            data.cam_xpos[self._camera],
            (self._rays @ rotation.T).reshape(-1),
            _VISIBLE_GROUPS,
            True,
            -1,
            self._geom,
            self._distance,
            self._normal,
            len(self._rays),
            _MAX_DISTANCE,
        )
        # |cos| lights both faces: meshes are not always closed, and a black back face hides geometry.
        light = _AMBIENT + (1 - _AMBIENT) * np.abs(self._normal.reshape(-1, 3) @ _LIGHT)
        image = (self._colours[self._geom] * light[:, None]).astype(np.uint8)
        image[self._geom < 0] = _BACKGROUND
        return image.reshape(self._side, self._side, 3)

    def depth(self) -> NDArray[np.float64]:
        """Return the distances [side, side] along the rays of the last image, -1 where nothing was hit."""
        return self._distance.reshape(self._side, self._side).copy()


def _geom_colours(model: mujoco.MjModel) -> NDArray[np.float64]:
    """Return each geom's colour [ngeom, 3] in 0..255: material over geom, times the texture's mean."""
    colours = model.geom_rgba[:, :3].astype(np.float64)
    for geom, material in enumerate(model.geom_matid):
        if material < 0:
            continue
        colours[geom] = model.mat_rgba[material, :3]
        texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
        if texture >= 0:
            start, channels = model.tex_adr[texture], model.tex_nchannel[texture]
            length = model.tex_height[texture] * model.tex_width[texture] * channels
            pixels = model.tex_data[start : start + length].reshape(-1, channels)
            colours[geom] *= pixels[:, :3].mean(axis=0) / 255
    return 255 * colours
