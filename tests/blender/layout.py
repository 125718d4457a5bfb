"""What panels are drawn into where Blender draws nothing."""

import bpy

FUNCTIONS = bpy.types.UILayout.bl_rna.functions


class Layout:
    """Stands in for a UILayout, which exists only while Blender draws: takes what a real one takes, and notes what a person would see."""

    def __init__(self, seen=None):
        self.seen = [] if seen is None else seen

    def __getattr__(self, name):
        if name not in FUNCTIONS:
            raise AttributeError(name)
        parameters = FUNCTIONS[name].parameters

        def call(*arguments, **given):
            for key, value in given.items():
                assert key in parameters, f"{name} takes no {key}"
                if key == "icon":
                    assert value in parameters["icon"].enum_items, f"there is no icon {value}"
            if name == "label":
                self.seen.append(given["text"])
            elif name == "progress":
                self.seen.append((given["text"], given["factor"]))
            elif name == "prop":
                assert arguments[1] in arguments[0].bl_rna.properties
                self.seen.append(arguments[1])
            elif name == "operator":
                return self.operator(*arguments, **given)
            elif name == "panel":
                return Layout(self.seen), Layout(self.seen)
            return Layout(self.seen)

        return call

    def operator(self, id, text=None, icon="NONE"):
        category, name = id.split(".")
        assert getattr(getattr(bpy.ops, category), name).get_rna_type() is not None, f"there is no operator {id}"
        made = Button(id, text)
        self.seen.append(made)
        return made


class Button:
    """An operator's button: what stands on it, and the operator's properties as they are set."""

    def __init__(self, id, text):
        category, name = id.split(".")
        kind = getattr(getattr(bpy.ops, category), name).get_rna_type()
        self.__dict__.update(id=id, label=kind.name if text is None else text, model="", url="", properties=kind.properties.keys())

    def __setattr__(self, name, value):
        assert name in self.properties, f"{self.id} takes no {name}"
        self.__dict__[name] = value

    def __eq__(self, other):
        return (self.id, self.model) == other
