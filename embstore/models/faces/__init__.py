"""Models of faces: find the faces of a picture, take the largest, align it as the model's library does, embed it.

    facenet    facenet-pytorch: MTCNN, InceptionResnetV1
    arcface    InsightFace's ONNX files, run by ONNX Runtime
    deepface   deepface, with its own choice of networks and detectors

Detection is part of `prepare`: it works on one picture, and may find that there is nothing to embed (`no_face`).
docs/images.md says what each one needs.
"""
